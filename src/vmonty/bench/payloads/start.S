/* The payload image on a bare machine: entered as Multiboot 1 wants it, it switches to 64-bit mode and runs the payload
 * that the command line asks for. Natively only its table is used. */
    .set IMAGE, 0x1000000
    .set STACK, 0x900000
    .set USER_STACK, 0xA00000
    .set TABLES, 0x800000

    .section .first, "ax"
    /* ---- the table of payloads: at the very start of the image -------------------------------------------- */
    .globl payload_table
payload_table:
    .quad alu, sieve, qsort_8mb, fib, crc32, sha256, lz_match, indirect_calls, pointer_chase, tree
    .quad zlib, regex
    .quad byte_copy, memcpy_rep, memcpy_sse, nbody, dot_sse, dot_avx2, bytes_sse
    .quad system_calls, context_switches, page_faults, page_faults_user

    .balign 4
header:
    .long 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000)
    .long header, IMAGE, _edata, _end, entry

    .code32
    .globl entry
entry:
    mov $STACK, %esp
    mov %ebx, %ebp
    /* TABLES: PML4, PDPT, PD of 2 MiB pages for the first GiB. */
    mov $TABLES, %edi
    xor %eax, %eax
    mov $0x1000, %ecx
    cld
    rep stosl
    movl $(TABLES + 0x1007), TABLES
    movl $(TABLES + 0x2007), TABLES + 0x1000
    mov $TABLES + 0x2000, %edi
    mov $0x87, %eax
1:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
    cmp $TABLES + 0x3000, %edi
    jb 1b
    mov $0x40620, %eax          /* OSXSAVE, OSXMMEXCPT, OSFXSR, PAE */
    mov %eax, %cr4
    mov $TABLES, %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx
    rdmsr
    or $0x101, %eax             /* LME, SCE */
    wrmsr
    mov $0x80010033, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $long_mode

    .code64
long_mode:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %ecx, %ecx
    xor %edx, %edx
    mov $7, %eax
    xsetbv
    lea tss(%rip), %rax
    mov %ax, gdt + 0x2A(%rip)
    shr $16, %rax
    mov %al, gdt + 0x2C(%rip)
    mov %ah, gdt + 0x2F(%rip)
    mov $0x28, %eax
    ltr %ax
    mov %ebp, %edi
    call guest_main
2:  hlt
    jmp 2b

    /* ---- privilege changes: u64 user_call(u64 (*)(u64), u64) ------------------------------------------------ */
    .globl user_call
user_call:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, kernel_stack(%rip)
    mov %rsp, tss + 4(%rip)
    mov $USER_STACK, %rsp
    lea in_user(%rip), %rcx
    mov $2, %r11d
    sysretq
in_user:
    mov %rdi, %rax
    mov %rsi, %rdi
    call *%rax
    mov %rax, %rdi
    mov $1, %eax
    syscall

    .globl syscall_entry
syscall_entry:
    mov %rsp, user_stack(%rip)
    mov kernel_stack(%rip), %rsp
    test %eax, %eax
    jne leave_user
    push %rcx
    push %r11
    call null_system_call
    pop %r11
    pop %rcx
    mov user_stack(%rip), %rsp
    sysretq
leave_user:
    mov %rdi, %rax
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .globl page_fault_entry
page_fault_entry:
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    cld
    mov %cr2, %rdi
    call map_page
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
    add $8, %rsp
    iretq

    .data
    .balign 16
gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF
    .quad 0x0000890000000067, 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt
    .balign 16
tss:
    .fill 104, 1, 0
kernel_stack:
    .quad 0
user_stack:
    .quad 0
    .section .note.GNU-stack, "", @progbits
