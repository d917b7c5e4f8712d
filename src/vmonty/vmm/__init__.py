"""The virtual machine monitor: machine, devices, boot. It reaches KVM through vmonty.kvm.api only."""
