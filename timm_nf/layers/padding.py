"""TensorFlow's SAME rule, by which all convolutions and pools of the authors are padded."""

__all__ = ["same_padding"]


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis under TensorFlow's SAME rule, for a kernel at least as large as its stride."""
    # (ceil(size / stride) - 1) * stride + kernel_size - size, in operations that a traced size has too; none of them
    # divides a negative number, which ONNX rounds the other way
    total = (size - 1) // stride * stride + kernel_size - size
    return total // 2, total - total // 2
