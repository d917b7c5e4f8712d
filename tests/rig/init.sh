#!/bin/busybox sh
# Process 1 of the rig. Reads /rig/settings (written for each run): KVM_AMD, SHELL_WANTED and the environment.
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /tmp /root /run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /rig/out
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
chmod 1777 /tmp  # no mount: the tree under test may lie there
mount -t debugfs debugfs /sys/kernel/debug
hostname rig
ip link set lo up
. /rig/settings

# In the order of their dependencies; those that a kernel has built in are not there.
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_console \
    irqbypass kvm; do
    [ ! -e "/rig/modules/$module.ko" ] || insmod "/rig/modules/$module.ko"
done
insmod /rig/modules/kvm-amd.ko $KVM_AMD

leave() {
    # Not even "Power down" on the console: the output is the command's.
    echo 0 >/proc/sys/kernel/printk
    poweroff -f
}

if [ -n "$SHELL_WANTED" ]; then
    cd "$WORKING_DIRECTORY"
    setsid cttyhack sh
    leave
fi

# A pipe, so that the command sees no terminal; raw, so that its bytes arrive as they are.
stty -F /dev/ttyS0 raw -echo
{
    /bin/sh /rig/command 2>&1 </dev/null
    echo $? >/rig/status
} | cat >/dev/ttyS0
# Waits until the line is idle.
stty -F /dev/ttyS0 sane

# The status comes last: whoever reads it knows that the rest is complete.
result=$(grep -l vmonty.result /sys/class/virtio-ports/*/name)
result=${result%/name}
tar -C /rig -cf "/dev/${result##*/}" out status
leave
