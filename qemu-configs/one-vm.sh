#!/usr/bin/env bash
# Starts one VM with any number of management devices, console on this terminal (Ctrl-A X ends it).
#
#   one-vm.sh --socket /run/vmgmt/vm1.sock --name vm1 --kernel vmlinuz --initrd initramfs
#   one-vm.sh --socket /run/vmgmt/vm1.sock --name vm1 --driver vfio --disk guest.qcow2
#
#   --socket PATH     a device at this socket of vmgmtd (again for more; none: no device)
#   --name NAME       QEMU's -name; the name a shared socket with identity = "name" sees (default vm1)
#   --memory MIB      (default 512)
#   --plain-memory    memory that vmgmtd cannot map: all goes by DMA messages
#   --driver uio|vfio which guest driver is wanted; vfio brings an IOMMU (default uio)
#   --iommu none|intel|virtio   another IOMMU than the driver's default
#   --kernel FILE --initrd FILE --append WORDS   direct boot; default: what `cargo xtask setup` built, if it is there
#   --disk FILE       a bootable qcow2 or raw disk instead
#   --serial DEVICE   where the console goes (default mon:stdio)
#   --dry-run         print the command line and end
#   -- ARGUMENTS      passed to QEMU as they are
#
# QEMU: $QEMU, else the one of `cargo xtask setup`, else qemu-system-x86_64 (10.1 or later).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${VMGMT_CACHE:-$here/../.cache}

fail() {
    echo "one-vm.sh: $*" >&2
    exit 2
}

sockets=() name=vm1 memory=512 plain=no driver=uio iommu='' kernel='' initrd='' append='' disk='' serial=mon:stdio dry=no extra=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --plain-memory) plain=yes; shift; continue ;;
        --dry-run) dry=yes; shift; continue ;;
        --) shift; extra=("$@"); break ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    esac
    [[ $# -ge 2 ]] || fail "$1 is unknown or wants a value; --help lists the options"
    case $1 in
        --socket) sockets+=("$2") ;;
        --name) name=$2 ;;
        --memory) memory=$2 ;;
        --driver) driver=$2 ;;
        --iommu) iommu=$2 ;;
        --kernel) kernel=$2 ;;
        --initrd) initrd=$2 ;;
        --append) append=$2 ;;
        --disk) disk=$2 ;;
        --serial) serial=$2 ;;
        *) fail "$1 is unknown; --help lists the options" ;;
    esac
    shift 2
done
[[ $driver == uio || $driver == vfio ]] || fail "--driver $driver: it is uio or vfio"
[[ $memory =~ ^[0-9]+$ ]] || fail "--memory $memory: it is a number of MiB"
if [[ -z $iommu ]]; then
    [[ $driver == vfio ]] && iommu=intel || iommu=none
fi

qemu=${QEMU:-}
if [[ -z $qemu ]]; then
    qemu=qemu-system-x86_64
    [[ -x $cache/qemu-system-x86_64 ]] && qemu=$cache/qemu-system-x86_64
fi
if [[ -z $disk && -z $kernel ]]; then
    built=("$cache"/guest-trixie-*/boot/vmlinuz-*)
    if [[ -e ${built[0]} && -e $cache/initramfs-small ]]; then
        kernel=${built[0]} initrd=$cache/initramfs-small
    fi
fi

arguments=(-name "$name" -nodefaults -display none -serial "$serial" -m "${memory}M")
if [[ -w /dev/kvm && ! -e $cache/kvm-probe ]] || grep -qs '^works$' "$cache/kvm-probe"; then
    arguments+=(-accel kvm -accel tcg -cpu max)
else
    # Without these TCG copies memory 4 to 5 times faster.
    arguments+=(-accel tcg -cpu max,-erms,-fsrm,-fsrs,-fsrc,-fzrm,-smap,-la57)
fi
if [[ $plain == yes ]]; then
    arguments+=(-M q35)
else
    # share=off would still send the descriptor, but of other memory: keep it on.
    arguments+=(-M q35,memory-backend=ram -object "memory-backend-memfd,id=ram,size=${memory}M,share=on")
fi
case $iommu in
    none) ;;
    intel) arguments+=(-device intel-iommu,caching-mode=on) append+=' intel_iommu=on' ;;
    virtio) arguments+=(-device virtio-iommu-pci) ;;
    *) fail "--iommu $iommu: it is none, intel or virtio" ;;
esac
if [[ -n $disk ]]; then
    arguments+=(-drive "file=$disk,if=virtio")
elif [[ -n $kernel ]]; then
    words="console=ttyS0 panic=-1 vmgmt.driver=$driver vmgmt.hostname=$name vmgmt.shell=1 $append"
    arguments+=(-kernel "$kernel" -append "$words")
    [[ -n $initrd ]] && arguments+=(-initrd "$initrd")
fi
number=0
for socket in ${sockets[@]+"${sockets[@]}"}; do
    [[ $socket == *[\"\\]* ]] && fail "--socket $socket: a quote or backslash in it would break the JSON"
    # Only the JSON form takes a socket. A root port of its own: the device can be unplugged and plugged in again.
    arguments+=(-device "pcie-root-port,id=port$number,chassis=$((number + 1)),slot=$number,io-reserve=4096")
    arguments+=(-device "{\"driver\":\"vfio-user-pci\",\"id\":\"mgmt$number\",\"bus\":\"port$number\",\"socket\":{\"type\":\"unix\",\"path\":\"$socket\"}}")
    number=$((number + 1))
done
arguments+=(${extra[@]+"${extra[@]}"})

if [[ $dry == yes ]]; then
    printf '%q ' "$qemu" "${arguments[@]}"
    echo
    exit 0
fi
for socket in ${sockets[@]+"${sockets[@]}"}; do
    [[ -S $socket ]] || fail "no socket $socket: is vmgmtd running, and is that the path in its configuration?"
done
exec "$qemu" "${arguments[@]}"
