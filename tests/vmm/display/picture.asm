; A boot sector that shows a picture in the video mode MODE, by the video BIOS and by writes of its own.
        bits 16
        org 0x7C00
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7C00
        cld
%if MODE >= 0x100
        mov ax, 0x4F02
        mov bx, MODE
        int 0x10
        cmp ax, 0x004F
        jne stop
        ; Bank after bank through the window: each byte depends on its place.
        mov ax, 0xA000
        mov es, ax
        xor dx, dx
bank:   push dx
        mov ax, 0x4F05
        xor bx, bx
        int 0x10
        pop dx
        xor di, di
byte_:  mov ax, di
        xor al, ah
        add al, dl
        stosb
        cmp di, DOTS
        jb byte_
        inc dx
        cmp dx, BANKS
        jb bank
%else
        mov ax, MODE
        int 0x10
%if MODE = 3
        ; Every character in changing colours, by the BIOS; then one line written directly.
        mov ah, 1
        mov cx, 0x2000          ; no cursor: it blinks
        int 0x10
        xor bx, bx
char:   mov al, bl
        and al, 0xF0
        cmp al, 0xB0            ; their ninth column is QEMU's own idea: IBM repeats the eighth from C0 on
        je skip
        mov ah, 2               ; cursor to (row, column)
        mov dh, bl
        shr dh, 6
        mov dl, bl
        and dl, 63
        push bx
        xor bh, bh
        int 0x10
        pop bx
        push bx
        mov al, bl
        not bl
        and bl, 0x7F            ; no blinking
        mov ah, 9
        xor bh, bh
        mov cx, 1
        int 0x10
        pop bx
skip:   inc bl
        jnz char
        mov ax, 0xB800
        mov es, ax
        mov di, 160 * 24
        mov si, text
next:   lodsb
        test al, al
        jz stop
        mov ah, 0x4E
        stosw
        jmp next
text:   db "The last line", 0xC4, 0xC4, 0xDB, 0
%elif MODE = 0x13
        mov ax, 0xA000
        mov es, ax
        xor di, di
dot:    mov ax, di
        add al, ah
        stosb
        cmp di, DOTS
        jb dot
%elif MODE = 0x12 || MODE = 0x0D
        ; Write mode 2: a colour at a time, under a bit mask.
        mov ax, 0xA000
        mov es, ax
        mov dx, 0x3CE
        mov ax, 0x0205
        out dx, ax
        xor di, di
dot:    mov ax, di
        mov al, 8
        out dx, ax              ; the bit mask is the high byte of the place
        mov al, es:[di]
        mov ax, di
        shr ax, 3
        stosb
        cmp di, DOTS
        jb dot
%else
        ; CGA: both banks.
        mov ax, 0xB800
        mov es, ax
        xor di, di
dot:    mov ax, di
        add al, ah
        stosb
        cmp di, DOTS
        jb dot
%endif
%endif
stop:   mov dx, 0x402           ; firmware's debug port: the picture stands
        mov al, '!'
        out dx, al
        hlt
        jmp stop
        times 510 - ($ - $$) db 0
        dw 0xAA55
