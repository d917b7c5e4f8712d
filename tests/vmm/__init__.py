"""The monitor: its devices as a driver sees them, boot, and whole machines on every KVM that is here."""
