"""The MMU: from guest-physical to host addresses."""
