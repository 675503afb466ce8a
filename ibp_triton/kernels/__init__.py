"""Triton kernels, one file an operation: device code with its launcher, both plain functions on tensors.

    contract   linear and convolution layers in all three directions (launchers: gemm, conv)
    wgrad      their weight gradients, several terms in one launch
    combine    second stage of a split reduction
    pooled_conv  a convolution of few inputs with the max-pool behind it
    pool       max- and mean-pooling, gates the ReLU alone, loss the head, norm_seeds what starts the extra passes
    norm_rows  layer, RMS, group and instance norms, in all directions (launchers: norms)
    attention_tiles  attention's forward pass, attention_sweeps its linear and reverse sweep (launchers: attentions)
    columns    batch norms in train mode: both sweeps
    geometry   sizes of windows; tiles the table of tile shapes; launcher the one door to the device
    plans      what follows from the layouts of a call's tensors, kept
    workbench  what they are checked and tuned with: interpreter, compiler, cases

Triton is imported here and nowhere else, and nothing queries a device at import.
"""
