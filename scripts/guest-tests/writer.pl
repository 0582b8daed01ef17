#!/usr/bin/perl
# Writes files with known content and fsyncs them, until told to stop; and looks whether what was fsynced is there.
#
#   writer.pl write DIR JOURNAL STOP [MARK-ADDRESS]   until the file STOP exists; what begins and each fsync that
#                                                     has returned is noted in JOURNAL and told to MARK-ADDRESS (HOST:PORT)
#   writer.pl check DIR JOURNAL                       every file must hold what its last note says, or something newer
#
# A file NAME is rewritten, appended to, replaced by rename, and removed. The note "NAME VERSION BYTES" means: NAME has at
# least this version. Content follows from name and version, so a torn or mixed file shows.
use strict;
use warnings;
use Fcntl;
use IO::Handle;
use IO::Socket::INET;

my $FILES = 12;

sub content {
    my ($name, $version, $bytes) = @_;
    my $line = sprintf("%s %08d ", $name, $version);
    return substr($line x (1 + $bytes / length $line), 0, $bytes);
}

sub fail { die "writer: @_\n" }

sub sync_dir {
    my ($dir) = @_;
    sysopen(my $handle, $dir, O_RDONLY | O_DIRECTORY) or fail("open $dir: $!");
    IO::Handle::sync($handle) or fail("fsync $dir: $!");
    close $handle;
}

# To the journal, and to whoever else wants to know; it is certain when this returns.
sub note {
    my ($notes, $marks, $line) = @_;
    print $notes "$line\n" or fail("journal: $!");
    return unless $marks;
    print $marks "$line\n" or fail("mark: $!");
    defined(my $answer = <$marks>) or fail("mark: no answer");
}

my ($what, $dir, $journal, $stop, $mark) = @ARGV;
if ($what eq 'write') {
    my $marks;
    if ($mark) {
        $marks = IO::Socket::INET->new(PeerAddr => $mark, Proto => 'tcp') or fail("$mark: $!");
        $marks->autoflush(1);
    }
    open(my $notes, '>>', $journal) or fail("$journal: $!");
    $notes->autoflush(1);
    srand(42);
    my ($version, $longest) = (0, 0);
    until (-e $stop) {
        $version++;
        my $name = sprintf("f%02d", int rand $FILES);
        my $bytes = 1 + int rand(rand() < 0.2 ? 300_000 : 20_000);
        my $path = "$dir/$name";
        my $replace = rand() < 0.3;
        my $target = $replace ? "$path.new" : $path;
        my $begun = time;
        # In place, the old content may be seen mixed with the new until the fsync returns; that is noted first.
        note($notes, $marks, "$name $version begin") unless $replace;
        sysopen(my $file, $target, O_WRONLY | O_CREAT | O_TRUNC) or fail("open $target: $!");
        my $data = content($name, $version, $bytes);
        my $done = 0;
        while ($done < $bytes) {
            my $written = syswrite($file, $data, $bytes - $done, $done);
            defined $written or fail("write $target: $!");
            $done += $written;
        }
        IO::Handle::sync($file) or fail("fsync $target: $!");
        close $file or fail("close $target: $!");
        if ($replace) {
            note($notes, $marks, "$name $version begin");
            rename $target, $path or fail("rename $target: $!");
        }
        sync_dir($dir);
        note($notes, $marks, "$name $version $bytes");
        my $took = time - $begun;
        $longest = $took if $took > $longest;
    }
    print "writer: $version files written and fsynced in $dir, the longest took $longest s\n";
} elsif ($what eq 'check') {
    my (%sure, %begun);
    open(my $notes, '<', $journal) or fail("$journal: $!");
    while (<$notes>) {
        my ($name, $version, $bytes) = /^(\S+) (\d+) (\d+|begin)$/ or next;
        if ($bytes eq 'begin') { $begun{$name} = $version }
        else { $sure{$name} = [$version, $bytes]; }
    }
    my $checked = 0;
    for my $name (sort keys %sure) {
        my ($version, $bytes) = @{$sure{$name}};
        # A rewrite that was under way leaves anything.
        next if ($begun{$name} // 0) > $version;
        open(my $file, '<', "$dir/$name") or fail("$dir/$name, fsynced as version $version, cannot be opened: $!");
        binmode $file;
        local $/;
        my $data = <$file>;
        $data eq content($name, $version, $bytes)
            or fail("$dir/$name is not what was fsynced as version $version: " . length($data) . " of $bytes bytes, begins '" . substr($data, 0, 13) . "'");
        $checked++;
    }
    print "writer: $checked files in $dir are what was fsynced\n";
} else {
    die "usage: see the top of $0\n";
}
