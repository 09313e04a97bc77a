class Matcher:
    pass


class ConstraintCompiler:
    def __init__(self, *a, **k):
        pass

    def compile(self, c):
        raise NotImplementedError
