"""The paper's layers and the loss head on Triton kernels. Imported only when asked for."""

from ibp_triton.backends import Backend
from ibp_triton.backends.triton.kernel_head import KernelHead
from ibp_triton.backends.triton.lower import lower

TRITON = Backend("triton", lower, KernelHead)
