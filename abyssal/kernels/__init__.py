"""Tensors -> tensors. A plain torch twin stands beside each fast form."""
