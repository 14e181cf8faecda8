"""What the files beside the weights say of a vocabulary: token string -> id.

Promises that every file which names tokens is read, and that two of them which disagree are an
error. Must not know tensors, checkpoints or where the files come from. Read: formats, files.
"""
