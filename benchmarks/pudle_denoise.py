def denoise(o): return {}
def draw(f,a): pass
def add_arguments(p): pass
