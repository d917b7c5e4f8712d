"""What tests of guests need: an assembler, fakes, tiny guests. Ships with the package."""
