"""What a run would cost a site and whether it would be refused, answered by the site itself beforehand."""
