#!/bin/sh
# Stage one, in the initial file system: a container's pivot_root needs a root that is a real mount, so move into one.
export PATH=/bin
mount -t tmpfs -o mode=755 root /root
for d in /*; do
    [ "$d" = /root ] || cp -a "$d" /root/
done
exec switch_root /root /vm/first
