from abyssal.data.markup import from_html, from_pod, from_roff, from_wordnet


def test_html_keeps_what_a_reader_sees():
    page = """<html><head><title>T</title><style>p {}</style></head><body><nav>home</nav>
<h1>Sea&nbsp;level<a href="#x">¶</a></h1><!-- not this --><p>a &lt; b &amp; <em>c</em></p>
<script>if (a < b) { run() }</script><table><tr><td>one</td><td>two</td></tr></table></body></html>"""
    assert from_html(page) == "Sea level\n\na < b & c\n\none two\n"


def test_roff_keeps_what_a_man_page_says():
    page = r""".\" a comment
.TH LS 1 "May 2024"
.de XX
never shown
..
.SH NAME
ls \- list \fBdirectory\fR contents \(em all of them
.SH "SEE ALSO"
.BR dir (1),
.B "two words"
.PP
It\(aqs \e at \s-1NASA\s0.
"""
    assert from_roff(page) == (
        "NAME\nls - list directory contents — all of them\n\nSEE ALSO\ndir(1),\ntwo words\n\nIt's \\ at NASA.\n"
    )


def test_pod_keeps_the_documentation_of_a_program():
    page = """use strict;

=head1 NAME

B<Sea> - I<very C<deep>> water E<lt>3 and L<the port|perlport/X>X<sea>

=over 4

=item one

C<< a->b >> is it.

=back

=cut

my $x = 1;
"""
    assert from_pod(page) == "NAME\n\nSea - very deep water <3 and the port\n\none\n\na->b is it.\n"
    assert from_pod("my $x = 1;\n\nprint $x;\n") == "\n"


def test_wordnet_becomes_glosses():
    lines = (
        "  1 This software and database is | licensed\n"
        '00002137 03 n 02 abstraction 0 abstract_entity 0 001 @ 00001740 n 0000 | a concept; "the sea"  \n'
        "00001740 29 v 01 breathe 0 001 * 00005041 v 0000 02 + 02 00 + 08 00 | draw air\n"
    )
    assert from_wordnet(lines) == 'abstraction, abstract entity: a concept; "the sea"\nbreathe: draw air\n'
