"""Network backends: what stands at the other end of a network device's cable."""
