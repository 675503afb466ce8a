"""What kernels are developed and checked with, with a GPU or without one.

lab        an instrumented interpreter: what a kernel does to memory
aot        the compiler for chips that are not there; cases what goes through it
autotune   better tiles than the table's, measured on a device, opt-in
"""
