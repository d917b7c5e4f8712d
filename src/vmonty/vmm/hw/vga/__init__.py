"""The display adapter: VGA, with the linear frame buffer and the DISPI registers of Bochs's card.

registers   sequencer, CRTC, graphics and attribute controllers, DAC
planes      the window at 0xA0000 onto four planes
dispi       modes beyond VGA's
scanout     what the registers say is on the screen
card        the PCI function that holds them
"""
