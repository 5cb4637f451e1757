"""The commands but train, a module each: `distseg NAME` imports the one that is asked for and calls its main.

None imports a scientific package at its top, so that --help answers at once. What a notebook may call too is the function
of the command's name; see distseg/__init__.py.
"""
