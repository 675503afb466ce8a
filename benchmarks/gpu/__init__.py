"""`make gpu`: what there is to prove on a GPU, in one command; docs/kernels.md, "The first GPU"."""
