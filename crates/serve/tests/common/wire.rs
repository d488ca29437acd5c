//! An HTTP client that keeps its connection, for tests that ask thousands of times.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long an answer may take; only a server that does not answer at all takes longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection, opened again when the server has closed it.
pub struct Wire {
    address: SocketAddr,
    stream: Option<TcpStream>,
    held: Vec<u8>,
}

impl Wire {
    pub fn new(address: SocketAddr) -> Wire {
        Wire { address, stream: None, held: Vec::new() }
    }

    /// Posts a body of any bytes; gives the status and the whole answer.
    pub fn post(&mut self, path: &str, body: &[u8]) -> std::io::Result<(u16, String)> {
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n"
        );
        let request = [head.as_bytes(), body].concat();
        // A connection may have been closed while it was idle, which is no failure.
        if self.stream.is_some()
            && let Ok(answer) = self.exchange(&request)
        {
            return Ok(answer);
        }
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        (self.stream, self.held) = (Some(stream), Vec::new());
        self.exchange(&request)
    }

    fn exchange(&mut self, request: &[u8]) -> std::io::Result<(u16, String)> {
        let answer = self.exchange_once(request);
        if answer.is_err() {
            self.stream = None;
        }
        answer
    }

    fn exchange_once(&mut self, request: &[u8]) -> std::io::Result<(u16, String)> {
        self.stream.as_mut().unwrap().write_all(request)?;
        let head = self.until(b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&head).to_lowercase();
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        let mut body = Vec::new();
        if head.contains("transfer-encoding: chunked") {
            loop {
                let line = self.until(b"\r\n")?;
                let size = String::from_utf8_lossy(&line[..line.len() - 2]).into_owned();
                let size = usize::from_str_radix(size.trim(), 16).unwrap();
                let chunk = self.exactly(size + 2)?;
                if size == 0 {
                    break;
                }
                body.extend_from_slice(&chunk[..size]);
            }
        } else {
            let length = head.split("content-length: ").nth(1).map_or(0, |rest| {
                rest.split("\r\n").next().unwrap().trim().parse::<usize>().unwrap()
            });
            body = self.exactly(length)?;
        }
        if head.contains("connection: close") {
            self.stream = None;
        }
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    fn until(&mut self, end: &[u8]) -> std::io::Result<Vec<u8>> {
        loop {
            if let Some(at) = self.held.windows(end.len()).position(|part| part == end) {
                return Ok(self.held.drain(..at + end.len()).collect());
            }
            self.more()?;
        }
    }

    fn exactly(&mut self, count: usize) -> std::io::Result<Vec<u8>> {
        while self.held.len() < count {
            self.more()?;
        }
        Ok(self.held.drain(..count).collect())
    }

    fn more(&mut self) -> std::io::Result<()> {
        let mut bytes = [0_u8; 16384];
        let count = self.stream.as_mut().unwrap().read(&mut bytes)?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.held.extend_from_slice(&bytes[..count]);
        Ok(())
    }
}
