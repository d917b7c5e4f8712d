"""qcow2, versions 2 and 3. Source: QEMU, docs/interop/qcow2.txt."""
