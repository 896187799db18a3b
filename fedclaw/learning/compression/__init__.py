"""Updates in fewer bytes: one method a file, each with a site half and a server half.

`request` says what can be asked for. Random-k (`randomk`) is a linear map that all sites share, so that its answers add
up; the other methods (`compressor`) make of each site's update a form of its own, which is opened when it arrives.
"""
