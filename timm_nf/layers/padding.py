"""TensorFlow's SAME rule. The authors pad all their convolutions and pools by it."""

__all__ = ["same_padding"]


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Padding before and after one axis. The kernel must be at least as large as the stride.

    Examples:
        >>> same_padding(size=6, kernel_size=3, stride=2)
        (0, 1)
    """
    # This is (ceil(size / stride) - 1) * stride + kernel_size - size, in operations that traced sizes have. No negative
    # number is divided: ONNX rounds that quotient towards zero, Python rounds it down.
    total = (size - 1) // stride * stride + kernel_size - size
    return total // 2, total - total // 2
