def double_all(values):
    return [v + 2 for v in values]


def subtract(y, d):
    return y - d
