"""kvm-intel in software."""
