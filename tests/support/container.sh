#!/bin/sh
# Becomes a pod's container, as far as the kernel alone allows: with its own root, in which only volumes can be written
# to, its own /dev/shm, and an unprivileged user. It must be the first process of its own namespaces.
#
#   sh container.sh ROOT USER SPECIFICATION COMMAND …
#
# ROOT is an empty folder. Every line of SPECIFICATION is a mount: `ro FROM TO`, `rw FROM TO` or `memory BYTES TO`.
set -e
root=$1 user=$2 specification=$3
shift 3
mount -t tmpfs -o mode=755 root "$root"
for name in bin lib lib64 sbin; do
    [ ! -L "/$name" ] || ln -s "$(readlink "/$name")" "$root/$name"
done
mkdir "$root/etc" "$root/proc" "$root/dev"
for name in hosts nsswitch.conf ld.so.cache alternatives wordnet group; do
    [ ! -e "/etc/$name" ] || cp -a "/etc/$name" "$root/etc/"
done
cat /etc/hosts >"$root/etc/hosts"
echo "dskd:x:$user:$user::/nonexistent:/usr/sbin/nologin" >"$root/etc/passwd"
mount -t proc proc "$root/proc"
for name in null zero random urandom; do
    : >"$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
while read -r kind from to; do
    mkdir -p "$root$to"
    case $kind in
        memory) mount -t tmpfs -o "mode=1777,size=$from" memory "$root$to" ;;
        rw) mount --bind "$from" "$root$to" ;;
        ro) mount --bind "$from" "$root$to" && mount -o remount,bind,ro "$root$to" ;;
    esac
done <"$specification"
mount -o remount,ro "$root"
exec chroot "$root" setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
    env --chdir="$WORKING_DIRECTORY" "$@"
