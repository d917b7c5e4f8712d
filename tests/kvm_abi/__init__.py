"""The KVM ABI suite: what every provider of KVM must do, shown with tiny guests."""
