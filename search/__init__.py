"""What is the fastest form of a network within a budget? The entry point is `tvm_lowrank.searching.commands.run`.

Here stand the words that all parts share: what may become of a site, what it costs, and the log of what was measured.
"""
