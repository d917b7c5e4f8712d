"""kvm-amd."""
