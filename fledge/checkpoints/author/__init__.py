"""`--reference`: reads, builds and calls the author's own code.

reference     the author's module with the checkpoint's weights, which is what `--reference` asks for
candidates    which classes of the files may be the checkpoint's
files         what the files and the checkpoint say about the values that a class needs
search        the values under which it has the checkpoint's shapes
kinds         what the names of values mean, and what shapes propose
statements    what the code says about values
construct     the arguments of a constructor
source        files, parsed
modules       names of those files, made when they are asked for
stand_ins     what takes the place of things that are not at hand
sandbox       how the code is run
call          how a module's forward is called
"""
