"""What measuring programs share: cases, interleaved timing, the truth, results that are kept."""
