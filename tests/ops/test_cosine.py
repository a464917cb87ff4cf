"""The cosine transform is scipy's."""

import torch
from scipy.fft import dctn

from latentcodec.ops.cosine import cosine_matrix


def test_the_cosine_matrix_is_scipys_orthonormal_transform():
    x = torch.randn(5, 6, 9).double()
    ours = cosine_matrix(6) @ x @ cosine_matrix(9).T
    torch.testing.assert_close(ours, torch.from_numpy(dctn(x.numpy(), axes=(1, 2), norm="ortho")))
