#!/bin/sh
# PID 1 of a driver VM: a stock kernel's first program. It mounts what programs expect, loads the disk's driver, and
# serves one-line commands on the second serial port until the machine goes away (driver_vm.rs has the protocol).
export PATH=/usr/bin:/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
while read -r module; do insmod "/lib/modules/$module"; done < /etc/modules.list

serve() {
    stty -F /dev/ttyS1 raw -echo
    exec < /dev/ttyS1 > /dev/ttyS1
    echo
    echo "vvu-driver-ready $(cat /proc/sys/kernel/random/boot_id)"
    while read -r token command; do
        echo "<<<$token"
        (eval "$command") < /dev/null 2>&1
        status=$?
        echo
        echo ">>>$token $status"
    done
}

# Not PID 1 itself: that gets a signal whenever a process ends that was left behind, and busybox's read then forgets the part
# of a line that it has read.
serve &
wait
