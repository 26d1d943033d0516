from tvm_lowrank.cli.app import main

main()
