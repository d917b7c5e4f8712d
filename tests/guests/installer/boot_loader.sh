#!/bin/sh
# The installer's last step: GRUB in the disk's boot sector, the network, a console without a password; then a reset.
set -e
. /usr/share/debconf/confmodule
disk=$(cat /tmp/installed-disk)
cat /etc/hostname > /target/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$(cat /etc/hostname)" > /target/etc/hosts
cp /etc/network/interfaces /target/etc/network/interfaces
cat > /target/etc/default/grub << END
GRUB_TIMEOUT=3
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0"
GRUB_TERMINAL="console serial"
END
log-output -t grub in-target sh -c 'DEBIAN_FRONTEND=noninteractive apt-get -qy install grub-pc'
log-output -t grub in-target grub-install "$disk"
log-output -t grub in-target update-grub
log-output -t finish in-target passwd -d root
log-output -t finish in-target dpkg --audit
logger -t finish "the installation is complete"
for mounted in $(sed -n 's|^[^ ]* \(/target[^ ]*\) .*|\1|p' /proc/mounts | sort -r); do
    umount "$mounted"
done
sync
reboot -f
