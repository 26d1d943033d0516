"""How is a Relax function run, watched and trained in PyTorch? The entry point is `torch_bridge.TorchBridge`."""
