def multiply(h, b):
    return h + b
