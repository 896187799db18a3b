"""Updates in fewer bytes: each method has a site half and a server half.

`protocol.compression` says what can be asked for. Random-k (`postprocessors`) is a linear map that all sites
share, so that its answers add up; the other methods (`compressor`) make of each site's update a form of its own, which
is opened when it arrives.
"""
