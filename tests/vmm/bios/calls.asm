; Calls the BIOS as a DOS-like system does, and tells by the debug console (port 0x402), one line to a call:
;   name flags eax ebx ecx edx, hexadecimal, as the call left them; what they must be stands in test_bios_calls.py.
; SECTORS of this program lie on the disk from its first one on; FREE is a sector that it may write.
SECTORS equ 12
FREE equ 40
BUFFER equ 0x5000
CONSOLE equ 0x402

%macro call_bios 2              ; interrupt, name
    int %1
    tell %2
%endmacro
%macro tell 1
    call report
    db %1, 0
%endmacro

start:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x4800
    cld
    sti
    mov [drive], dl
    mov dh, 0
    mov cx, 2                   ; cylinder 0, sector 2
    mov ax, 0x0200 + SECTORS - 1
    mov bx, 0x7E00
    int 0x13
    jnc whole
    tell 'load'
    jmp stop

; In: the name behind the call. All registers and flags are kept.
report:
    pushfd
    pushad
    push ds
    push es
    xor ax, ax
    mov ds, ax
    mov bp, sp
    mov si, [bp + 40]           ; the address that report returns to: the name
    mov dx, CONSOLE
.name:
    lodsb
    test al, al
    jz .named
    out dx, al
    jmp .name
.named:
    mov [bp + 40], si
    mov eax, [bp + 36]          ; flags
    call number
    mov eax, [bp + 32]
    call number
    mov eax, [bp + 20]
    call number
    mov eax, [bp + 28]
    call number
    mov eax, [bp + 24]
    call number
    mov al, 10
    out dx, al
    pop es
    pop ds
    popad
    popfd
    ret

number:                         ; a blank, and eax
    push eax
    mov al, ' '
    out dx, al
    pop eax
    mov cx, 8
.digit:
    rol eax, 4
    push ax
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe .out
    add al, 'a' - '9' - 1
.out:
    out dx, al
    pop ax
    loop .digit
    ret

drive: db 0
    times 510 - ($ - $$) db 0
    dw 0xAA55

whole:
    tell 'load'
    call screen
    call graphics
    call disk
    call memory
    call clock
    call pci
    call keyboard
stop:
    tell 'end'
    cli
    hlt
    jmp stop

; ---- INT 10h -----------------------------------------------------------------------------------------
screen:
    mov ax, 0x0003
    int 0x10
    mov ah, 0x0F
    call_bios 0x10, 'mode'
    mov ax, 0x0200
    mov bh, 0
    mov dx, 0x0A14
    int 0x10
    mov cx, 0x0607
    mov ah, 1
    int 0x10
    mov ah, 3
    mov bh, 0
    call_bios 0x10, 'cursor'
    mov ax, 0x095A              ; three Z, yellow on blue
    mov bx, 0x001E
    mov cx, 3
    int 0x10
    mov ah, 8
    mov bh, 0
    call_bios 0x10, 'character'
    mov ax, 0xB800
    mov fs, ax
    mov eax, [fs:(10 * 80 + 20 + 1) * 2]
    tell 'text-memory'
    mov ax, 0x0603              ; up three lines
    mov bh, 7
    xor cx, cx
    mov dx, 0x184F
    int 0x10
    mov eax, [fs:(7 * 80 + 20) * 2]
    mov ebx, [fs:(10 * 80 + 20) * 2]
    tell 'scroll'
    mov ax, 0x1301
    mov bx, 0x002F
    mov cx, 4
    mov dx, 0x0500
    mov bp, text
    int 0x10
    mov eax, [fs:(5 * 80 + 2) * 2]
    tell 'string'
    mov ah, 3
    mov bh, 0
    call_bios 0x10, 'cursor-after'
    mov dx, 0x1800              ; at the last line: the teletype scrolls
    mov ah, 2
    int 0x10
    mov ax, 0x0E0A
    mov bx, 7
    int 0x10
    mov eax, [fs:(4 * 80 + 2) * 2]
    tell 'teletype'
    mov ax, 0x1A00
    call_bios 0x10, 'display'
    mov ah, 0x12
    mov bl, 0x10
    call_bios 0x10, 'ega'
    mov ax, 0x1130
    mov bh, 6
    push es
    int 0x10
    mov eax, [es:bp + 'A' * 16 + 4]
    pop es
    tell 'font'
    ret
text: db 'abcd'

graphics:
    mov ax, 0x0013
    int 0x10
    mov ax, 0x0C2A
    mov bh, 0
    mov cx, 319
    mov dx, 199
    int 0x10
    mov ah, 0x0D
    call_bios 0x10, 'pixel-256'
    mov ax, 0xA000
    mov fs, ax
    movzx eax, byte [fs:199 * 320 + 319]
    tell 'frame-256'
    mov ax, 0x0012
    int 0x10
    mov ax, 0x0C0D
    mov bh, 0
    mov cx, 639
    mov dx, 479
    int 0x10
    mov ah, 0x0D
    call_bios 0x10, 'pixel-16'
    mov dword [BUFFER], 'VBE2'
    mov ax, 0x4F00
    mov di, BUFFER
    int 0x10
    mov ebx, [BUFFER]
    tell 'vbe'
    mov ax, 0x4F02
    mov bx, 0x4118
    call_bios 0x10, 'vbe-set'
    mov ax, 0x4F03
    call_bios 0x10, 'vbe-mode'
    mov ax, 0x4F01
    mov cx, 0x0118
    mov di, BUFFER
    int 0x10
    mov ebx, [BUFFER + 0x12]    ; width and height
    mov ecx, [BUFFER + 0x28]    ; the frame buffer's address
    tell 'vbe-info'
    mov ax, 0x0003
    int 0x10
    mov ah, 0x0F
    call_bios 0x10, 'mode-again'
    ret

; ---- INT 13h -----------------------------------------------------------------------------------------
%macro call_disk 2              ; ax, name
    mov ax, %1
    mov dl, [drive]
    call_bios 0x13, %2
%endmacro
disk:
    call_disk 0, 'reset'
    push es
    mov di, 0
    call_disk 0x0800, 'geometry'
    pop es
    call_disk 0x1500, 'type'
    mov bx, 0x55AA
    call_disk 0x4100, 'extensions'
    mov word [BUFFER], 0x1E
    mov si, BUFFER
    mov ax, 0x4800
    mov dl, [drive]
    int 0x13
    mov ebx, [BUFFER + 16]      ; sectors
    movzx ecx, word [BUFFER + 24]
    tell 'parameters'
    mov di, BUFFER              ; a pattern, by CHS to sector FREE
    mov cx, 128
    mov eax, 0x12345678
.fill:
    stosd
    add eax, 0x01030507
    loop .fill
    mov bx, BUFFER
    mov cx, FREE + 1
    mov dh, 0
    call_disk 0x0301, 'write-chs'
    mov bx, BUFFER + 512
    mov cx, FREE + 1
    mov dh, 0
    call_disk 0x0201, 'read-chs'
    mov si, BUFFER
    mov di, BUFFER + 512
    mov cx, 128
    repe cmpsd
    tell 'same-chs'
    mov dword [packet + 8], FREE
    mov si, packet              ; the same sector and one more, by LBA
    call_disk 0x4200, 'read-lba'
    mov si, BUFFER
    mov di, BUFFER + 1024
    mov cx, 128
    repe cmpsd
    tell 'same-lba'
    mov dword [packet + 8], FREE + 2
    mov si, packet
    call_disk 0x4300, 'write-lba'
    mov si, packet
    call_disk 0x4400, 'verify'
    mov si, packet
    call_disk 0x4700, 'seek'
    mov dword [packet + 8], 0x7FFFFFFF
    mov si, packet
    call_disk 0x4200, 'beyond'
    call_disk 0x0100, 'status'
    mov bx, BUFFER
    mov cx, 0                   ; there is no sector 0
    mov dh, 0
    call_disk 0x0201, 'sector-0'
    mov ax, 0x4100
    mov bx, 0x55AA
    mov dl, 0x8F
    call_bios 0x13, 'no-drive'
    ret
packet:
    dw 16, 2, BUFFER + 1024, 0
    dq 0

; ---- INT 15h, 11h, 12h -------------------------------------------------------------------------------
memory:
    xor ebx, ebx
.next:
    mov eax, 0xE820
    mov edx, 'PAMS'
    mov ecx, 20
    mov di, BUFFER
    int 0x15
    push ebx
    jc .bad
    mov ebx, [BUFFER]           ; addresses and lengths below 4 GiB
    mov ecx, [BUFFER + 8]
    mov edx, [BUFFER + 16]
    tell 'e820'
    pop ebx
    test ebx, ebx
    jnz .next
    jmp .mapped
.bad:
    pop ebx
    tell 'e820-failed'
.mapped:
    mov ah, 0x88
    call_bios 0x15, 'extended'
    mov ax, 0xE801
    call_bios 0x15, 'e801'
    int 0x12
    tell 'low'
    int 0x11
    tell 'equipment'
    mov ax, 0x2403
    call_bios 0x15, 'a20-support'
    mov ax, 0x2400
    call_bios 0x15, 'a20-off'
    mov ax, 0x2402
    call_bios 0x15, 'a20-is-off'
    mov ax, 0x2401
    call_bios 0x15, 'a20-on'
    mov ax, 0x2402
    call_bios 0x15, 'a20-is-on'
    mov ax, 0xFFFF              ; above 1 MiB there is other memory than at 0
    mov fs, ax
    mov dword [0x600], 0x11223344
    mov dword [fs:0x610], 0x55667788
    mov eax, [0x600]
    mov ebx, [fs:0x610]
    tell 'above-1m'
    push es
    mov ah, 0xC0
    int 0x15
    movzx ecx, word [es:bx]
    movzx edx, byte [es:bx + 2]
    pop es
    tell 'configuration'
    mov dword [gdt + 0x10], 0xFFFF       ; a block move to 3 MiB and back
    mov dword [gdt + 0x14], 0x00009300
    mov word [gdt + 0x12], BUFFER
    mov dword [gdt + 0x18], 0x0000FFFF
    mov dword [gdt + 0x1C], 0x00009330
    mov si, gdt
    mov cx, 256
    mov ah, 0x87
    call_bios 0x15, 'move-up'
    mov word [gdt + 0x12], 0
    mov dword [gdt + 0x14], 0x00009330
    mov word [gdt + 0x1A], BUFFER + 0x800
    mov dword [gdt + 0x1C], 0x00009300
    mov si, gdt
    mov cx, 256
    mov ah, 0x87
    call_bios 0x15, 'move-down'
    mov si, BUFFER
    mov di, BUFFER + 0x800
    mov cx, 128
    repe cmpsd
    tell 'same-move'
    mov ax, 0x5300
    mov bx, 0
    call_bios 0x15, 'apm'
    mov ah, 0x86
    mov cx, 0
    mov dx, 30000               ; microseconds
    call_bios 0x15, 'wait'
    mov ax, 0xFF00
    call_bios 0x15, 'unknown'
    ret
    align 8
gdt: times 48 db 0

; ---- INT 1Ah, 8, 1Ch ---------------------------------------------------------------------------------
clock:
    mov word [0x1C * 4], tick
    mov word [0x1C * 4 + 2], 0
    mov ah, 0
    int 0x1A
    shl ecx, 16
    mov cx, dx
    mov ebx, ecx
.wait:
    hlt
    cmp word [ticks], 4
    jb .wait
    mov ah, 0
    int 0x1A
    shl ecx, 16
    mov cx, dx
    sub ecx, ebx
    tell 'ticks'
    mov ah, 1
    mov cx, 0x0012
    mov dx, 0x3400
    int 0x1A
    mov ah, 0
    call_bios 0x1A, 'set-ticks'
    mov ah, 4
    call_bios 0x1A, 'date'
    mov ah, 3
    mov cx, 0x1234
    mov dx, 0x5600
    int 0x1A
    mov ah, 2
    call_bios 0x1A, 'time'
    ret
tick:
    inc word [cs:ticks]
    iret
ticks: dw 0

pci:
    mov ax, 0xB101
    mov edi, 0
    call_bios 0x1A, 'pci'
    mov ax, 0xB102
    mov cx, 0x1237
    mov dx, 0x8086
    mov si, 0
    call_bios 0x1A, 'find-host-bridge'
    mov ax, 0xB10A
    mov bx, 0
    mov di, 0
    call_bios 0x1A, 'host-bridge'
    mov ax, 0xB103
    mov ecx, 0x030000
    mov si, 0
    call_bios 0x1A, 'find-vga'
    mov ax, 0xB102
    mov cx, 0x1234
    mov dx, 0x9999
    mov si, 0
    call_bios 0x1A, 'find-nothing'
    ret

; ---- INT 16h -----------------------------------------------------------------------------------------
keyboard:
    mov ah, 1
    call_bios 0x16, 'no-key'
    mov ax, 0x0500
    mov cx, 0x2C7A
    call_bios 0x16, 'put-key'
    mov ah, 1
    call_bios 0x16, 'peek-key'
    mov ah, 0
    call_bios 0x16, 'got-key'
    mov ah, 2
    call_bios 0x16, 'shifts'
    tell 'type-now'
    mov di, 6                   ; what the test types
.key:
    mov ah, 0x10
    call_bios 0x16, 'key'
    dec di
    jnz .key
    mov ah, 1
    call_bios 0x16, 'no-more'
    ret
    times SECTORS * 512 - ($ - $$) db 0
