"""How is something run on a device, be it this machine or boards? The entry point is `device.open_device`."""
