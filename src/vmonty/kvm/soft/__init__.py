"""KVM in software: kvm.ko and its vendor modules in Python, with the kernel's decomposition and names."""
