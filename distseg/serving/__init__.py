"""The model outside its run: the exported files, their verification, Triton's repositories, its server and its clients."""
