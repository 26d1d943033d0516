"""How is something run on a device? The entry point is `device.open_device`: this machine, or boards, behind one face."""
