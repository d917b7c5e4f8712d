"""Failures of VMX instructions. SDM, "VM-Instruction Error Numbers"."""

from __future__ import annotations

TEXTS = {
    -1: "#UD: not in VMX operation",
    0: "VMfailInvalid: no current VMCS, or not a VMX region",
    1: "VMCALL executed in VMX root operation",
    2: "VMCLEAR with invalid physical address",
    3: "VMCLEAR with VMXON pointer",
    4: "VMLAUNCH with non-clear VMCS",
    5: "VMRESUME with non-launched VMCS",
    7: "VM entry with invalid control field(s)",
    8: "VM entry with invalid host-state field(s)",
    9: "VMPTRLD with invalid physical address",
    10: "VMPTRLD with VMXON pointer",
    11: "VMPTRLD with incorrect VMCS revision identifier",
    12: "VMREAD/VMWRITE from/to unsupported VMCS component",
    13: "VMWRITE to read-only VMCS component",
    15: "VMXON executed in VMX root operation",
    26: "VM entry with events blocked by MOV SS",
    28: "Invalid operand to INVEPT/INVVPID",
}


class VmxError(Exception):
    """A VMX instruction failed.

    ``number`` is the VM-instruction error (VMfailValid), 0 for VMfailInvalid, -1 for #UD outside VMX operation.
    """

    def __init__(self, instruction: str, number: int) -> None:
        super().__init__(f"{instruction}: {TEXTS.get(number, 'unknown error')} ({number})")
        self.instruction = instruction
        self.number = number
