"""One file a slug: what a case's inputs mean in polypatch's terms.

``run(case)`` returns the outputs by the case's own names (without ``output.``; the name ``""``
stands for a lone ``output``); ``count(config)`` the parameters of a named variant. Complete
networks that take the inputs in order and return one tensor need no file.
"""
