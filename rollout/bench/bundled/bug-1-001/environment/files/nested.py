def https_multiply(i, k):
    return i + k
