#!/bin/sh
# A step of the installer's menu: one bootable partition with ext4 on the first disk, mounted at /target.
set -e
. /usr/share/debconf/confmodule
depmod -a
modprobe -a ata_piix virtio_blk sd_mod ext4
update-dev > /dev/null
for name in vda sda; do
    [ ! -b /dev/$name ] || break
done
log-output -t disk sh -c "echo ,,L,'*' | sfdisk --label dos /dev/$name"
update-dev > /dev/null
log-output -t disk mke2fs -q -t ext4 -L root "/dev/${name}1"
mkdir -p /target
mount -t ext4 "/dev/${name}1" /target
mkdir -p /target/etc/apt/apt.conf.d
echo "LABEL=root / ext4 errors=remount-ro 0 1" > /target/etc/fstab
# The mirror of the test is not signed; what it serves was checked when it was fetched.
echo 'Acquire::AllowInsecureRepositories "true";' > /target/etc/apt/apt.conf.d/00insecure
echo "/dev/$name" > /tmp/installed-disk
