# What containers may not do to the machine, whatever user and capabilities they have. Loaded by orlop's CRI server.
profile orlop-default flags=(attach_disconnected,mediate_deleted) {
  capability,
  network,
  file,
  umount,

  # The monitor stops containers; their own processes see and signal each other.
  signal (receive) peer=unconfined,
  signal (send, receive) peer=orlop-default,
  ptrace (read, readby, trace, tracedby) peer=orlop-default,

  deny mount,

  # Of the kernel's settings only those of System V IPC, which are the pod's own.
  deny /proc/[^1-9]* w,
  deny /proc/{acpi,asound,bus,driver,fs,irq,scsi,tty}/** wkl,
  deny /proc/sys/{[^k],k[^e]}** wkl,
  deny /proc/sys/kernel/{[^ms],m[^s],s[^eh],se[^m],sh[^m]}** wkl,
  deny /proc/{kcore,kmem,mem,sysrq-trigger} rwklx,

  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}/** wklx,
  deny /sys/fs/{[^c],c[^g],cg[^r]}** wklx,
  deny /sys/firmware/** r,
  deny /sys/devices/virtual/powercap/** r,
  deny /sys/kernel/security/** r,
}
