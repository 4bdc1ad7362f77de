def add_commands(c): pass
def run(o, b): pass
