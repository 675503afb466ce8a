"""What kernels are developed and checked with, with a GPU or without one.

lab        an instrumented interpreter: what a kernel does to memory
aot        the compiler for chips that are not there; cases what goes through it
model      how long a launch should take on a card; sass counts its instructions
host       what a launch's Python takes
autotune   better tiles than the table's, measured on a device, opt-in
"""
